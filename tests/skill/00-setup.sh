pip install labtasker
labtasker-server serve &    # start server
labtasker init              # interactive config — creates .labtasker/config.toml
labtasker queue create-from-config
