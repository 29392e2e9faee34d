"""Heads: hidden states -> states at later offsets, which the shared unembedding turns into logits."""
