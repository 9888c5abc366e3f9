"""HTTP: who may ask, the protocol, and samples of many clients in one running batch.

- `protocol`: requests, errors, the API's description of itself
- `gate`: hosts, origins, tokens, headers
- `api`: routes, answers, streams
- `scheduler`: samples of many clients in one running batch
- `server`: the socket, limits on connections, the end
"""
