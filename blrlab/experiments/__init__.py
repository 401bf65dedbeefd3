"""The command that strings the stages together; a config file says what it does."""
