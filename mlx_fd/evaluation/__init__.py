"""What a student is worth: examinations where the truth is known, and the statistics of them."""
