"""Who judges summaries: the protocol, and a language model behind an endpoint."""
