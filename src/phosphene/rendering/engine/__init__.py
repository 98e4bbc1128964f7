"""What makes rendering fast without changing what it computes."""
