"""The plugins that come with loratool, declared as entry points like anybody else's."""
