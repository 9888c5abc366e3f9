"""OpenAI's completions API over HTTP, for many clients of one running batch, and a page to try a model.

- `access`: access control by host, origin and token; security headers, the request log
- `api`: routes and metrics
- `completion`: a completion while its samples are decoded; streams of events
- `page/`: the page that browsers load
- `protocol`: requests, responses, errors, and the OpenAPI description
- `scheduler`: one thread that decodes the samples of all clients in one batch
- `server`: the socket, limits on connections, the shutdown
"""
