"""What a frozen encoder and its groups have learned: measures with floors, groups, one page.

`options` has the settings, `run` the whole way; `measures` is the list of sections of the table.
"""
