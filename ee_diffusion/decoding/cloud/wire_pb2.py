"""Generated protocol buffer code."""
from google.protobuf import descriptor as _descriptor
from google.protobuf import descriptor_pool as _descriptor_pool
from google.protobuf import runtime_version as _runtime_version
from google.protobuf import symbol_database as _symbol_database
from google.protobuf.internal import builder as _builder
_runtime_version.ValidateProtobufRuntimeVersion(
    _runtime_version.Domain.PUBLIC,
    7,
    35,
    1,
    '',
    'ee_diffusion/decoding/cloud/wire.proto'
)

_sym_db = _symbol_database.Default()




DESCRIPTOR = _descriptor_pool.Default().AddSerializedFile(b'\n&ee_diffusion/decoding/cloud/wire.proto\x12\x15\x65\x65_diffusion.cloud.v1\"B\n\x0bOpenRequest\x12\x0f\n\x07version\x18\x01 \x01(\r\x12\x13\n\x0b\x66ingerprint\x18\x02 \x01(\t\x12\r\n\x05width\x18\x03 \x01(\r\"\x1c\n\tOpenReply\x12\x0f\n\x07session\x18\x01 \x01(\t\"\x82\x01\n\rUploadRequest\x12\x0f\n\x07session\x18\x01 \x01(\t\x12\r\n\x05\x66irst\x18\x02 \x01(\r\x12\r\n\x05\x63ount\x18\x03 \x01(\r\x12\x31\n\x08\x65ncoding\x18\x04 \x01(\x0e\x32\x1f.ee_diffusion.cloud.v1.Encoding\x12\x0f\n\x07payload\x18\x05 \x01(\x0c\"\x1d\n\x0bUploadReply\x12\x0e\n\x06stored\x18\x01 \x01(\r\"0\n\x0bNextRequest\x12\x0f\n\x07session\x18\x01 \x01(\t\x12\x10\n\x08position\x18\x02 \x01(\r\"=\n\tNextReply\x12\x10\n\x08position\x18\x01 \x01(\r\x12\r\n\x05token\x18\x02 \x01(\r\x12\x0f\n\x07seconds\x18\x03 \x01(\x01\"2\n\x0fRollbackRequest\x12\x0f\n\x07session\x18\x01 \x01(\t\x12\x0e\n\x06length\x18\x02 \x01(\r\"\x1f\n\x0c\x43loseRequest\x12\x0f\n\x07session\x18\x01 \x01(\t\"\x07\n\x05\x45mpty*V\n\x08\x45ncoding\x12\x18\n\x14\x45NCODING_UNSPECIFIED\x10\x00\x12\x0b\n\x07\x46LOAT32\x10\x01\x12\x0b\n\x07\x46LOAT16\x10\x02\x12\x0c\n\x08\x42\x46LOAT16\x10\x03\x12\x08\n\x04INT8\x10\x04\x32\x95\x03\n\x05\x43loud\x12L\n\x04Open\x12\".ee_diffusion.cloud.v1.OpenRequest\x1a .ee_diffusion.cloud.v1.OpenReply\x12R\n\x06Upload\x12$.ee_diffusion.cloud.v1.UploadRequest\x1a\".ee_diffusion.cloud.v1.UploadReply\x12L\n\x04Next\x12\".ee_diffusion.cloud.v1.NextRequest\x1a .ee_diffusion.cloud.v1.NextReply\x12P\n\x08Rollback\x12&.ee_diffusion.cloud.v1.RollbackRequest\x1a\x1c.ee_diffusion.cloud.v1.Empty\x12J\n\x05\x43lose\x12#.ee_diffusion.cloud.v1.CloseRequest\x1a\x1c.ee_diffusion.cloud.v1.Emptyb\x06proto3')

_globals = globals()
_builder.BuildMessageAndEnumDescriptors(DESCRIPTOR, _globals)
_builder.BuildTopDescriptorsAndMessages(DESCRIPTOR, 'ee_diffusion.decoding.cloud.wire_pb2', _globals)
if not _descriptor._USE_C_DESCRIPTORS:
  DESCRIPTOR._loaded_options = None
  _globals['_ENCODING']._serialized_start=534
  _globals['_ENCODING']._serialized_end=620
  _globals['_OPENREQUEST']._serialized_start=65
  _globals['_OPENREQUEST']._serialized_end=131
  _globals['_OPENREPLY']._serialized_start=133
  _globals['_OPENREPLY']._serialized_end=161
  _globals['_UPLOADREQUEST']._serialized_start=164
  _globals['_UPLOADREQUEST']._serialized_end=294
  _globals['_UPLOADREPLY']._serialized_start=296
  _globals['_UPLOADREPLY']._serialized_end=325
  _globals['_NEXTREQUEST']._serialized_start=327
  _globals['_NEXTREQUEST']._serialized_end=375
  _globals['_NEXTREPLY']._serialized_start=377
  _globals['_NEXTREPLY']._serialized_end=438
  _globals['_ROLLBACKREQUEST']._serialized_start=440
  _globals['_ROLLBACKREQUEST']._serialized_end=490
  _globals['_CLOSEREQUEST']._serialized_start=492
  _globals['_CLOSEREQUEST']._serialized_end=523
  _globals['_EMPTY']._serialized_start=525
  _globals['_EMPTY']._serialized_end=532
  _globals['_CLOUD']._serialized_start=623
  _globals['_CLOUD']._serialized_end=1028
