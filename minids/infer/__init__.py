"""Generation on a latent KV cache: `generate.LanguageModel`, and `chat` for terminals."""
