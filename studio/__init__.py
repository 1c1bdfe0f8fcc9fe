"""The studio: a browser application and a command line on top of `core`."""
