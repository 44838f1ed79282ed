"""Images as files: PNG, JPEG or WebP, each saying inside that it is synthetic."""

import io
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

from PIL import Image, PngImagePlugin

from facediffuser.dataset.schema import DIGITAL_SOURCE_TYPE, provenance

ImageFormat = Literal["png", "jpeg", "webp"]
SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
QUALITY = 95
SOURCE = "synthetic: made by a trained model"


def encode_image(image: Image.Image, image_format: ImageFormat, sample_id: str, synthetic: bool = True) -> bytes:
    """Return the file of a generated image; the same image and id give the same bytes with the same libraries.

    Args:
        image: the image, 8-bit RGB.
        image_format: png, jpeg or webp.
        sample_id: the row's, named in the provenance.
        synthetic: whether the file says that it is synthetic: as XMP and, in PNG, as text chunks too.
    """
    sink = io.BytesIO()
    packet = xmp_packet(sample_id)
    xmp = {"xmp": packet.encode()} if synthetic else {}
    if image_format == "png":
        texts = PngImagePlugin.PngInfo()
        if synthetic:
            texts.add_itxt("XML:com.adobe.xmp", packet)
            texts.add_text("Software", provenance()["software"])
            texts.add_text("Source", SOURCE)
        image.save(sink, "PNG", pnginfo=texts, compress_level=4)
    elif image_format == "jpeg":
        image.save(sink, "JPEG", quality=QUALITY, subsampling=0, **xmp)
    else:
        image.save(sink, "WEBP", quality=QUALITY, **xmp)
    return sink.getvalue()


def xmp_packet(sample_id: str) -> str:
    """Return the XMP packet that marks an image as made by a trained model (IPTC's DigitalSourceType)."""
    software = provenance()["software"]
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        'xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/" '
        f'Iptc4xmpExt:DigitalSourceType="{DIGITAL_SOURCE_TYPE}" xmp:CreatorTool={quoteattr(software)}>'
        f"<dc:identifier>{escape(sample_id)}</dc:identifier></rdf:Description></rdf:RDF></x:xmpmeta>"
        '<?xpacket end="w"?>'
    )
