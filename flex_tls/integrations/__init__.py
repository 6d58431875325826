"""Two-level attention inside other libraries' models. Importing this patches nothing."""
