"""The page of ``app.py``: ask, review, and what they are made of."""
