"""Makes the buckets named on the command line, on the server that the standard AWS environment names."""

import sys

import boto3
from botocore.exceptions import ClientError

ALREADY_OURS = "BucketAlreadyOwnedByYou"


def make_bucket(name: str) -> bool:
    """Make a bucket and return whether it is new; one that we own already is left as it is."""
    client = boto3.client("s3")
    if name in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
        return False
    try:
        client.create_bucket(Bucket=name)
    except ClientError as error:
        if error.response["Error"]["Code"] != ALREADY_OURS:
            raise
        return False
    return True


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(f"{argument}: {'made' if make_bucket(argument) else 'there already'}")
