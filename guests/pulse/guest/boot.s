# Entry points, stacks and page tables. Intel SDM volume 3, chapters 4 and 10; the PVH entry follows Xen's
# docs/misc/pvh.pandoc (32-bit protected mode, paging off, ebx = hvm_start_info).

.section .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18                  # name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long _start32

.section .text.boot, "ax", @progbits
.code64
.globl _start64
_start64:                           # rdi = vCPU index, rsi = boot info
    cli
    cld
    cmp rdi, 64
    jae 2f
    lea rax, [rdi + 1]
    shl rax, 15
    mov rsp, offset __stacks
    add rsp, rax
    xor ebp, ebp
    call pulse_main
2:  cli
    hlt
    jmp 2b

.code32
.globl _start32
_start32:                           # ebx = hvm_start_info
    cli
    cld
    mov esi, ebx
    mov edi, offset __page_tables   # PML4, PDPT, then 4 page directories: 4 GiB in 2 MiB pages
    lea eax, [edi + 0x1007]
    mov [edi], eax
    lea eax, [edi + 0x2007]
    xor ecx, ecx
3:  mov [edi + 0x1000 + ecx * 8], eax
    add eax, 0x1000
    inc ecx
    cmp ecx, 4
    jne 3b
    xor ecx, ecx
    mov eax, 0x87
4:  mov [edi + 0x2000 + ecx * 8], eax
    add eax, 0x200000
    inc ecx
    cmp ecx, 2048
    jne 4b
    mov cr3, edi
    mov eax, cr4
    or eax, 0x20
    mov cr4, eax
    mov ecx, 0xC0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    or eax, 0x80000001
    mov cr0, eax
    lgdt [__gdt_pointer]
    .byte 0xEA                      # jmp 0x08:_pvh64
    .long _pvh64
    .word 8
.code64
_pvh64:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov rsp, offset __stacks + 0x8000
    xor ebp, ebp
    mov edi, esi
    call pvh_main
5:  cli
    hlt
    jmp 5b

    .balign 8
__gdt:
    .quad 0, 0x00209B0000000000, 0x00CF93000000FFFF
__gdt_pointer:
    .word 23
    .long __gdt
    .long 0

.section .bss.shared, "aw", @nobits
    .balign 4096
.globl __shared
__shared:
    .skip 0x2000

.section .bss.boot, "aw", @nobits
    .balign 4096
.globl __page_tables
__page_tables:
    .skip 0x6000
.globl __stacks
__stacks:
    .skip 64 * 0x8000
.text
