"""HTTP side of the server: routes, fields, errors, signals."""
