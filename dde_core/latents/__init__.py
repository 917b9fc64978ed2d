"""Latent shards, written by ingest and read by training: Parquet files for plain pyarrow, and a manifest."""
