"""The files that questions are read from: their forms, and what is mended or refused in them."""
