"""Networks, of students and of teachers."""
