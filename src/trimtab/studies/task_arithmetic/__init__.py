"""Small experts merged by task arithmetic, steering the strong model as one expert."""
