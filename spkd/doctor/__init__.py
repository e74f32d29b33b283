"""What `spkd doctor` prints: what is installed, what works, and what is missing for what."""
