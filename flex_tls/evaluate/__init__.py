"""What sparse decoding loses, measured through the decode path that users run: ``flex-tls eval``."""
