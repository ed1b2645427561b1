"""What is tried before a release."""
