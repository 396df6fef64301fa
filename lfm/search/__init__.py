"""Search: the user's own documents, web search providers, page fetch, and what of it goes into a prompt."""
