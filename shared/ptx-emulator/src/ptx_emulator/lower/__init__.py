"""From the syntax tree to the operations of the runtime; one file per instruction group."""
