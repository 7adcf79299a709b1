"""Records to padded batches: reading, encoding, collating and sampling."""
