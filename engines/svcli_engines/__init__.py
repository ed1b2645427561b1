"""A bundle runs: pictures and messages in, text out."""
