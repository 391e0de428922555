"""What to compute next: plain Python over integers. Time is an argument; no torch."""
