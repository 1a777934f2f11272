"""Decisions as pure functions: no asyncio, os, socket, time, random or logging here; ``now`` is an argument."""
