# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: D101, the declarations in C say what the structures are
"""The C structures through which XLA calls a foreign function, under XLA's names: xla/ffi/api/c_api.h.

The comment above each structure is its declaration in C. jaxlib has the header (`jax.ffi.include_dir()`), and a test
compares these structures with it. XLA adds fields only at the ends of structures, so the offsets here stay valid. Names
are those of version 0.4 of the interface. Before that, XLA_FFI_InternalExtension was XLA_FFI_Extension_Base, and
XLA_FFI_Error_GetDetails was XLA_FFI_Error_GetMessage, which has no errc.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p

# The oldest version of the interface with everything that is used here. XLA accepts handlers for older versions.
XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR = 0, 1

XLA_FFI_Extension_Metadata = 1  # a value of XLA_FFI_InternalExtension_Type
XLA_FFI_ExecutionStage_EXECUTE = 3
XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE = 1 << 0
XLA_FFI_Error_Code_INVALID_ARGUMENT = 3
XLA_FFI_Error_Code_RESOURCE_EXHAUSTED = 8
XLA_FFI_Error_Code_INTERNAL = 13

# XLA_FFI_DataType by the name of the NumPy dtype. gpu3d uses no others.
XLA_FFI_DataType = {
    "uint8": 6,
    "int32": 4,
    "int64": 5,
    "float16": 10,
    "float32": 11,
    "float64": 12,
    "bfloat16": 16,
}


# struct XLA_FFI_InternalExtension {
#   size_t struct_size;
#   XLA_FFI_InternalExtension_Type type;
#   struct XLA_FFI_InternalExtension* next;
# };
class XLA_FFI_InternalExtension(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("type", c_int), ("next", c_void_p)]


# struct XLA_FFI_Api_Version {
#   size_t struct_size;
#   XLA_FFI_InternalExtension* extension_start;
#   int major_version;  // out
#   int minor_version;  // out
# };
class XLA_FFI_Api_Version(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("major_version", c_int),
        ("minor_version", c_int),
    ]


# struct XLA_FFI_Metadata {
#   size_t struct_size;
#   XLA_FFI_Api_Version api_version;
#   XLA_FFI_Handler_Traits traits;
# };
class XLA_FFI_Metadata(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("api_version", XLA_FFI_Api_Version), ("traits", c_uint32)]


# struct XLA_FFI_Metadata_Extension {
#   XLA_FFI_InternalExtension extension_base;
#   XLA_FFI_Metadata* metadata;
# };
class XLA_FFI_Metadata_Extension(ctypes.Structure):
    _fields_ = [("extension_base", XLA_FFI_InternalExtension), ("metadata", ctypes.POINTER(XLA_FFI_Metadata))]


# struct XLA_FFI_Buffer {
#   size_t struct_size;
#   XLA_FFI_InternalExtension* extension_start;
#   XLA_FFI_DataType dtype;
#   void* data;
#   int64_t rank;
#   int64_t* dims;  // length == rank
# };
class XLA_FFI_Buffer(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("dtype", c_int),
        ("data", c_void_p),
        ("rank", c_int64),
        ("dims", c_void_p),
    ]


# typedef struct XLA_FFI_ByteSpan {
#   const char* ptr;
#   size_t len;
# } XLA_FFI_ByteSpan;
class XLA_FFI_ByteSpan(ctypes.Structure):
    _fields_ = [("ptr", c_void_p), ("len", c_size_t)]


# struct XLA_FFI_Args {
#   size_t struct_size;
#   XLA_FFI_InternalExtension* extension_start;
#   int64_t size;
#   XLA_FFI_ArgType* types;  // length == size
#   void** args;             // length == size
# };
class XLA_FFI_Args(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("size", c_int64),
        ("types", c_void_p),
        ("args", c_void_p),
    ]


# struct XLA_FFI_Rets {
#   size_t struct_size;
#   XLA_FFI_InternalExtension* extension_start;
#   int64_t size;
#   XLA_FFI_RetType* types;  // length == size
#   void** rets;             // length == size
# };
class XLA_FFI_Rets(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("size", c_int64),
        ("types", c_void_p),
        ("rets", c_void_p),
    ]


# struct XLA_FFI_Attrs {
#   size_t struct_size;
#   XLA_FFI_InternalExtension* extension_start;
#   int64_t size;
#   XLA_FFI_AttrType* types;   // length == size
#   XLA_FFI_ByteSpan** names;  // length == size
#   void** attrs;              // length == size
# };
class XLA_FFI_Attrs(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("size", c_int64),
        ("types", c_void_p),
        ("names", c_void_p),
        ("attrs", c_void_p),
    ]


# struct XLA_FFI_CallFrame {
#   size_t struct_size;
#   XLA_FFI_InternalExtension* extension_start;
#   const XLA_FFI_Api* api;
#   XLA_FFI_InvokeContext* ctx;
#   XLA_FFI_ExecutionStage stage;
#   XLA_FFI_Args args;
#   XLA_FFI_Rets rets;
#   XLA_FFI_Attrs attrs;
# };
class XLA_FFI_CallFrame(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("api", c_void_p),
        ("ctx", c_void_p),
        ("stage", c_int),
        ("args", XLA_FFI_Args),
        ("rets", XLA_FFI_Rets),
        ("attrs", XLA_FFI_Attrs),
    ]


# typedef XLA_FFI_Error* XLA_FFI_Handler(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Handler = ctypes.CFUNCTYPE(c_void_p, c_void_p)


# struct XLA_FFI_Error_Create_Args {
#   size_t struct_size;
#   XLA_FFI_InternalExtension* extension_start;
#   const char* message;
#   XLA_FFI_Error_Code errc;
# };
class XLA_FFI_Error_Create_Args(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("extension_start", c_void_p), ("message", c_char_p), ("errc", c_int)]


# struct XLA_FFI_Error_GetDetails_Args {
#   size_t struct_size;
#   XLA_FFI_InternalExtension* extension_start;
#   XLA_FFI_Error* error;
#   const char* message;      // out
#   XLA_FFI_Error_Code errc;  // out
# };
class XLA_FFI_Error_GetDetails_Args(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("error", c_void_p),
        ("message", c_char_p),
        ("errc", c_int),
    ]


# struct XLA_FFI_Error_Destroy_Args {
#   size_t struct_size;
#   XLA_FFI_InternalExtension* extension_start;
#   XLA_FFI_Error* error;
# };
class XLA_FFI_Error_Destroy_Args(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("extension_start", c_void_p), ("error", c_void_p)]


# struct XLA_FFI_Stream_Get_Args {
#   size_t struct_size;
#   XLA_FFI_InternalExtension* extension_start;
#   XLA_FFI_InvokeContext* ctx;
#   void* stream;  // out
# };
class XLA_FFI_Stream_Get_Args(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("extension_start", c_void_p), ("ctx", c_void_p), ("stream", c_void_p)]


# struct XLA_FFI_DeviceOrdinal_Get_Args {
#   size_t struct_size;
#   XLA_FFI_InternalExtension* extension_start;
#   XLA_FFI_InvokeContext* ctx;
#   int32_t device_ordinal;  // out
# };
class XLA_FFI_DeviceOrdinal_Get_Args(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("ctx", c_void_p),
        ("device_ordinal", c_int32),
    ]


# struct XLA_FFI_DeviceMemory_Allocate_Args {
#   size_t struct_size;
#   XLA_FFI_InternalExtension* extension_start;
#   XLA_FFI_InvokeContext* ctx;
#   size_t size;
#   size_t alignment;
#   void* data;  // out
# };
class XLA_FFI_DeviceMemory_Allocate_Args(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("ctx", c_void_p),
        ("size", c_size_t),
        ("alignment", c_size_t),
        ("data", c_void_p),
    ]


# struct XLA_FFI_DeviceMemory_Free_Args {
#   size_t struct_size;
#   XLA_FFI_InternalExtension* extension_start;
#   XLA_FFI_InvokeContext* ctx;
#   size_t size;
#   void* data;
# };
class XLA_FFI_DeviceMemory_Free_Args(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("ctx", c_void_p),
        ("size", c_size_t),
        ("data", c_void_p),
    ]


# struct XLA_FFI_Api {
#   size_t struct_size;
#   XLA_FFI_InternalExtension* extension_start;
#   XLA_FFI_Api_Version api_version;
#   const XLA_FFI_InternalApi* internal_api;
#   XLA_FFI_Error_Create* XLA_FFI_Error_Create;  // and a pointer to each of the other functions
#   ...
# };
class XLA_FFI_Api(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("api_version", XLA_FFI_Api_Version),
        ("internal_api", c_void_p),
        ("XLA_FFI_Error_Create", c_void_p),
        ("XLA_FFI_Error_GetDetails", c_void_p),
        ("XLA_FFI_Error_Destroy", c_void_p),
        ("XLA_FFI_Handler_Register", c_void_p),
        ("XLA_FFI_Stream_Get", c_void_p),
        ("XLA_FFI_Type_Register", c_void_p),
        ("XLA_FFI_InvokeContext_Get", c_void_p),
        ("XLA_FFI_State_Set", c_void_p),
        ("XLA_FFI_State_Get", c_void_p),
        ("XLA_FFI_DeviceMemory_Allocate", c_void_p),
        ("XLA_FFI_DeviceMemory_Free", c_void_p),
        ("XLA_FFI_ThreadPool_Schedule", c_void_p),
        ("XLA_FFI_ThreadPool_NumThreads", c_void_p),
        ("XLA_FFI_Future_Create", c_void_p),
        ("XLA_FFI_Future_SetAvailable", c_void_p),
        ("XLA_FFI_Future_SetError", c_void_p),
        ("XLA_FFI_RunId_Get", c_void_p),
        ("XLA_FFI_DeviceOrdinal_Get", c_void_p),
    ]


def struct_size(structure: type[ctypes.Structure]) -> int:
    """The size that the header calls X_STRUCT_SIZE: up to the end of the last field, without padding."""
    last = getattr(structure, structure._fields_[-1][0])
    return last.offset + last.size
