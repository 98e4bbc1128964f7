"""What each page shows, as plain values for its template."""
