"""Product and query encoders and the embedding tables that they write."""
