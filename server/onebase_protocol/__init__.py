"""Answers and events of the HTTP API: the server encodes them, and the SDK decodes them.

Imports nothing of OneBase's other packages, which is why `command_line`, the parser of all commands, is here.
A field without a default is in every answer. In a `Sparse` answer a field that has its default is left out;
in any other it is sent all the same, and the default stands for it where an older server does not send it.
Fields that the SDK does not know are ignored.
"""
