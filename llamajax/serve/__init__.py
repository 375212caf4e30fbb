"""Requests from other programs: OpenAI's protocol, and files of requests and results. Knows no terminal."""
