"""Every filter of a network: the jobs, their runners, and the report."""
