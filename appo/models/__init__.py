"""Models of transformers: those that are served, the sizes of published ones, loading, what a loaded one holds."""
