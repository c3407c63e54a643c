"""Answers and events of the HTTP API, which the server encodes and the SDK decodes, and the parser of commands.

Imports nothing of OneBase's other packages. A field without a default is in every answer. In a `Sparse`
answer a field that has its default is left out; in any other it is sent all the same, and the default stands
for it where an older server does not send it. Fields that the SDK does not know are ignored.
"""
