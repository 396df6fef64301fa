"""One module per search provider. Each turns a SearchQuery into a request and the answer into SearchResults.

The web ones were written from what their makers publish and are tested against fakes of it, on loopback. None has been
run against the live service. A provider takes only its own key, and sends it to its own address only.
"""
