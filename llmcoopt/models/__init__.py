"""Models that come with the package, one folder each; `tiny` is the default of `llmcoopt demo`."""
