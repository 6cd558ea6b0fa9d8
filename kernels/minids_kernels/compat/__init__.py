"""The names and signatures of other projects, served by this one's kernels."""
