"""Latent shards: what ingest writes and training reads. Parquet files that plain pyarrow reads, and a manifest."""
