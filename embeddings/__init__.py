"""Product and query encoders and the embedding tables that they write."""

from embeddings.encoder import Encoder
from embeddings.tables import EmbeddingTable, read_table, write_table

__all__ = ["EmbeddingTable", "Encoder", "read_table", "write_table"]
