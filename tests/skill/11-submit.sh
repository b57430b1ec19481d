# Basic
labtasker task submit -- --lr=0.001 --model=resnet

# With name, metadata, priority, max-retries
labtasker task submit \
    --name grid_search \
    --metadata '{"tags": ["v1", "experimental"], "note": "baseline run"}' \
    --priority 10 \
    --max-retries 5 \
    -- --lr=0.001 --model=resnet

# Batch submit in a loop
for lr in 0.001 0.01 0.1; do
    for model in resnet vit; do
        labtasker task submit \
            --name grid_search \
            --metadata '{"tags": ["v1"]}' \
            -- --lr=$lr --model=$model
    done
done

# Alternative: pass args as JSON dict string
labtasker task submit --args '{"arg1": 0, "arg2": 3}'

# Nested args via dot-notation — --foo.bar=1 becomes args["foo"]["bar"] = 1
labtasker task submit -- --optimizer.lr=0.01 --optimizer.momentum=0.9
