"""What test modules share: factories for tasks and problems."""
