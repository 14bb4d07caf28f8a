"""Matrix products of rows sorted by group with one matrix a group: the experts of a mixture."""
