"""From row files to packed token shards on disk."""
