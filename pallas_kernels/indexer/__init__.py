"""Lightning indexer: how relevant each earlier token is to each query."""
