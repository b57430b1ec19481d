labtasker task submit -- --value=-1 --label="" --desc="hello world"
