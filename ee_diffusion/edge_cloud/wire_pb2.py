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
    'ee_diffusion/edge_cloud/wire.proto'
)

_sym_db = _symbol_database.Default()




DESCRIPTOR = _descriptor_pool.Default().AddSerializedFile(b'\n\"ee_diffusion/edge_cloud/wire.proto\x12\x15\x65\x65_diffusion.cloud.v2\"\x8a\x01\n\x0bOpenRequest\x12\x0f\n\x07version\x18\x01 \x01(\r\x12<\n\x05terms\x18\x02 \x03(\x0b\x32-.ee_diffusion.cloud.v2.OpenRequest.TermsEntry\x1a,\n\nTermsEntry\x12\x0b\n\x03key\x18\x01 \x01(\t\x12\r\n\x05value\x18\x02 \x01(\t:\x02\x38\x01\"\x1c\n\tOpenReply\x12\x0f\n\x07session\x18\x01 \x01(\t\"\x82\x01\n\rUploadRequest\x12\x0f\n\x07session\x18\x01 \x01(\t\x12\r\n\x05\x66irst\x18\x02 \x01(\r\x12\r\n\x05\x63ount\x18\x03 \x01(\r\x12\x31\n\x08\x65ncoding\x18\x04 \x01(\x0e\x32\x1f.ee_diffusion.cloud.v2.Encoding\x12\x0f\n\x07payload\x18\x05 \x01(\x0c\"\x1d\n\x0bUploadReply\x12\x0e\n\x06stored\x18\x01 \x01(\r\"0\n\x0bNextRequest\x12\x0f\n\x07session\x18\x01 \x01(\t\x12\x10\n\x08position\x18\x02 \x01(\r\"=\n\tNextReply\x12\x10\n\x08position\x18\x01 \x01(\r\x12\r\n\x05token\x18\x02 \x01(\r\x12\x0f\n\x07seconds\x18\x03 \x01(\x01\"2\n\x0fRollbackRequest\x12\x0f\n\x07session\x18\x01 \x01(\t\x12\x0e\n\x06length\x18\x02 \x01(\r\"\x1f\n\x0c\x43loseRequest\x12\x0f\n\x07session\x18\x01 \x01(\t\"\x07\n\x05\x45mpty*V\n\x08\x45ncoding\x12\x18\n\x14\x45NCODING_UNSPECIFIED\x10\x00\x12\x0b\n\x07\x46LOAT32\x10\x01\x12\x0b\n\x07\x46LOAT16\x10\x02\x12\x0c\n\x08\x42\x46LOAT16\x10\x03\x12\x08\n\x04INT8\x10\x04\x32\x95\x03\n\x05\x43loud\x12L\n\x04Open\x12\".ee_diffusion.cloud.v2.OpenRequest\x1a .ee_diffusion.cloud.v2.OpenReply\x12R\n\x06Upload\x12$.ee_diffusion.cloud.v2.UploadRequest\x1a\".ee_diffusion.cloud.v2.UploadReply\x12L\n\x04Next\x12\".ee_diffusion.cloud.v2.NextRequest\x1a .ee_diffusion.cloud.v2.NextReply\x12P\n\x08Rollback\x12&.ee_diffusion.cloud.v2.RollbackRequest\x1a\x1c.ee_diffusion.cloud.v2.Empty\x12J\n\x05\x43lose\x12#.ee_diffusion.cloud.v2.CloseRequest\x1a\x1c.ee_diffusion.cloud.v2.Emptyb\x06proto3')

_globals = globals()
_builder.BuildMessageAndEnumDescriptors(DESCRIPTOR, _globals)
_builder.BuildTopDescriptorsAndMessages(DESCRIPTOR, 'ee_diffusion.edge_cloud.wire_pb2', _globals)
if not _descriptor._USE_C_DESCRIPTORS:
  DESCRIPTOR._loaded_options = None
  _globals['_OPENREQUEST_TERMSENTRY']._loaded_options = None
  _globals['_OPENREQUEST_TERMSENTRY']._serialized_options = b'8\001'
  _globals['_ENCODING']._serialized_start=603
  _globals['_ENCODING']._serialized_end=689
  _globals['_OPENREQUEST']._serialized_start=62
  _globals['_OPENREQUEST']._serialized_end=200
  _globals['_OPENREQUEST_TERMSENTRY']._serialized_start=156
  _globals['_OPENREQUEST_TERMSENTRY']._serialized_end=200
  _globals['_OPENREPLY']._serialized_start=202
  _globals['_OPENREPLY']._serialized_end=230
  _globals['_UPLOADREQUEST']._serialized_start=233
  _globals['_UPLOADREQUEST']._serialized_end=363
  _globals['_UPLOADREPLY']._serialized_start=365
  _globals['_UPLOADREPLY']._serialized_end=394
  _globals['_NEXTREQUEST']._serialized_start=396
  _globals['_NEXTREQUEST']._serialized_end=444
  _globals['_NEXTREPLY']._serialized_start=446
  _globals['_NEXTREPLY']._serialized_end=507
  _globals['_ROLLBACKREQUEST']._serialized_start=509
  _globals['_ROLLBACKREQUEST']._serialized_end=559
  _globals['_CLOSEREQUEST']._serialized_start=561
  _globals['_CLOSEREQUEST']._serialized_end=592
  _globals['_EMPTY']._serialized_start=594
  _globals['_EMPTY']._serialized_end=601
  _globals['_CLOUD']._serialized_start=692
  _globals['_CLOUD']._serialized_end=1097
