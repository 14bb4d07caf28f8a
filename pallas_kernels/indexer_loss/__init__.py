"""The loss that teaches the indexer to rank keys as attention does."""
