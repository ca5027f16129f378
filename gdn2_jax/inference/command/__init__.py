"""Parts of programs that write text: flags, Ctrl-C, printing, sessions."""
